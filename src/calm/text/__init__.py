"""Text in, numpy out: tokenizers, corpora, token shards on disk, chunks and batches. Nothing here imports jax.

In reading order:

tokenizer      text <-> ids: bytes, byte-level BPE, words, any tokenizer.json, tiktoken rank files
sources        a source named by the user -> a stream of documents cut into pieces (python_docs, files, hub)
prepare        a source -> a folder of memory-mapped token shards with a manifest; survives kill -9
shards         that folder, checked and opened for reading
chunking       prompts -> chunks of K tokens
batches        seeded, resumable training batches; evaluation blocks
continuation   generated ids -> the text that follows a prompt, whole or streamed
"""
