"""Small languages whose distribution is known exactly: ground truth for scores, bounds and samplers. Numpy only.

world          the interface: samples, n-gram probabilities, entropy rate, ceilings, temperature targets
finite_state   worlds of finitely many states: the Markov chain, and whatever is compiled into one
grammar        a probabilistic grammar: sentences with agreement across nested clauses
key_value      settings and queries, where the answer lies far back
registry       a world from its name, as in `calm data prepare --source world:NAME`
"""

from calm.worlds.finite_state import FiniteStateWorld, MarkovWorld
from calm.worlds.grammar import GrammarWorld, Rule, compile_grammar
from calm.worlds.key_value import KeyValueWorld
from calm.worlds.registry import WORLDS, build_world, world_of
from calm.worlds.world import Chain, NgramTable, World, tempered

__all__ = [
    "WORLDS",
    "Chain",
    "FiniteStateWorld",
    "GrammarWorld",
    "KeyValueWorld",
    "MarkovWorld",
    "NgramTable",
    "Rule",
    "World",
    "build_world",
    "compile_grammar",
    "tempered",
    "world_of",
]
