"""The paper: a chunk of K tokens as one vector, and a language model that predicts the next vector."""
