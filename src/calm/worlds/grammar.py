"""A probabilistic context-free grammar of bounded nesting, and its exact next-token distribution.

A left-to-right derivation keeps a stack of symbols that are still to come. The tokens read leave a probability for each stack
(Jelinek and Lafferty 1991 sum the same derivations for prefix probabilities); each such belief becomes one state of a
finite-state world, found by reading on from the start of a document until no new belief appears. Differs: the grammar must
leave finitely many beliefs, so nesting has to be bounded by its symbols.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from calm.errors import UsageError
from calm.worlds.finite_state import MAX_STATES, FiniteStateWorld

END = "<|end|>"
"""the symbol of a document's end in rules"""

Stack = tuple[str, ...]
Belief = tuple[tuple[Stack, float], ...]


class Rule(NamedTuple):
    """One expansion of a symbol, possibly empty. Weights of a symbol's rules need not sum to 1."""

    weight: float
    symbols: Stack


Grammar = dict[str, list[Rule]]


def compile_grammar(name: str, grammar: Grammar, start: str) -> FiniteStateWorld:
    """Compiles a grammar into a finite-state world.

    Args:
      name: of the world, and in messages.
      grammar: rules of each symbol; symbols without rules are words.
      start: the symbol that follows `END`; its derivation must never end.

    Raises UsageError: left recursion, a derivation that ends, more than `MAX_STATES` beliefs.
    """
    words = tuple(dict.fromkeys(symbol for rules in grammar.values() for rule in rules for symbol in rule.symbols))
    words = tuple(word for word in words if word not in grammar and word != END)
    ids = {word: number for number, word in enumerate(words)} | {END: len(words) + 1}

    @functools.cache
    def next_words(stack: Stack, above: Stack = ()) -> dict[tuple[str, Stack], float]:
        """Probability of each (next word, stack after it); `above` are the symbols that were opened without a word."""
        if not stack:
            raise UsageError(f"grammar {name}: a derivation ends; let a document end with {END} and a new one begin")
        top, rest = stack[0], stack[1:]
        if top not in grammar:
            return {(top, rest): 1.0}
        if top in above:
            raise UsageError(f"grammar {name}: {top} begins with itself; write the rules without left recursion")
        total = sum(rule.weight for rule in grammar[top])
        if not total > 0:
            raise UsageError(f"grammar {name}: the rules of {top} have no weight")
        found: dict[tuple[str, Stack], float] = defaultdict(float)
        for rule in grammar[top]:
            opened = (*above, top) if rule.symbols else ()
            for key, chance in next_words((*rule.symbols, *rest), opened).items():
                found[key] += rule.weight / total * chance
        return dict(found)

    first: Belief = (((start,), 1.0),)
    states = {first: 0}
    rows: list[dict[str, tuple[float, int]]] = []
    pending = [first]
    while pending:
        belief, row = pending.pop(0), {}
        after: dict[str, dict[Stack, float]] = defaultdict(lambda: defaultdict(float))
        for stack, chance in belief:
            for (word, rest), probability in next_words(stack).items():
                after[word][rest] += chance * probability
        for word, stacks in after.items():
            total = sum(stacks.values())
            # Equal beliefs reached in two ways differ in their last bits.
            key = tuple(sorted((stack, round(chance / total, 12)) for stack, chance in stacks.items()))
            if key not in states:
                if len(states) == MAX_STATES:
                    raise UsageError(f"grammar {name}: more than {MAX_STATES} states; bound how deep its symbols nest")
                states[key] = len(states)
                pending.append(key)
            row[word] = (total, states[key])
        rows.append(row)

    table, following = np.zeros((len(rows), len(words) + 3)), np.zeros((len(rows), len(words) + 3), np.int64)
    for state, row in enumerate(rows):
        for word, (chance, target) in row.items():
            table[state, ids[word]], following[state, ids[word]] = chance, target
    return FiniteStateWorld(name, words, table / table.sum(-1, keepdims=True), following)


NOUNS = "dog cat bird girl king friend horse neighbour teacher driver".split()
BOTH = ["sheep", "fish", "deer"]
TRANSITIVE = "see find know follow hear like help call".split()
INTRANSITIVE = "run sleep sing wait laugh swim".split()


class GrammarWorld(FiniteStateWorld):
    """English-like sentences: subject and verb agree in number, also across relative clauses, inside which others do.

    "the dog that the cats see runs ." Some nouns do not show their number ("the sheep that the dog sees runs ."): then the verb
    does, and until it is read the exact distribution is a mixture. Words have Zipf probabilities in a random order.

    Args:
      clauses: probability that a noun carries a relative clause.
      depth: most clauses that are open inside each other, 0 to 4.
      sentences: average number of sentences of a document.
      seed: of the order of the words.
    """

    def __init__(self, *, clauses: float = 0.3, depth: int = 2, sentences: int = 24, seed: int = 0):
        if not 0 <= clauses < 1 or not 0 <= depth <= 4 or sentences < 2 or seed < 0:
            raise UsageError(
                f"world grammar: need 0 <= clauses < 1, 0 <= depth <= 4, sentences >= 2 and seed >= 0, got "
                f"clauses={clauses:g}, depth={depth}, sentences={sentences}, seed={seed}"
            )
        generator = np.random.default_rng(seed)
        made = compile_grammar("grammar", _english(clauses, depth, sentences, generator), "DOCUMENT")
        super().__init__("grammar", made.words, made.table_of_states, made.following)


def _english(clauses: float, depth: int, sentences: int, generator: np.random.Generator) -> Grammar:
    """Rules of the grammar. Symbols end in the number of clauses that may still open inside: SUBJECT:one:2."""

    def lexicon(words: Sequence[str]) -> list[tuple[float, str]]:
        return [(1 / (1 + rank), str(words[place])) for rank, place in enumerate(generator.permutation(len(words)))]

    nouns, transitive, intransitive = lexicon([*NOUNS, *BOTH]), lexicon(TRANSITIVE), lexicon(INTRANSITIVE)
    grammar: Grammar = {
        "DOCUMENT": [Rule(1, ("SENTENCE", "MORE"))],
        "MORE": [Rule(1, (END, "DOCUMENT")), Rule(sentences - 1, ("SENTENCE", "MORE"))],
        "SENTENCE": [
            Rule(weight, (f"SUBJECT:{number}:{depth}", f"PREDICATE:{number}:{depth}", "."))
            for weight, number in ((0.6, "one"), (0.4, "many"))
        ],
    }
    for number, noun_ending, article, verb_ending in (("one", "", "a", "s"), ("many", "s", "some", "")):
        grammar[f"NOUN:{number}"] = [Rule(weight, (word if word in BOTH else word + noun_ending,)) for weight, word in nouns]
        grammar[f"TRANSITIVE:{number}"] = [Rule(weight, (word + verb_ending,)) for weight, word in transitive]
        grammar[f"INTRANSITIVE:{number}"] = [Rule(weight, (word + verb_ending,)) for weight, word in intransitive]
        for level in range(depth + 1):
            rest = (f"NOUN:{number}", f"CLAUSE:{number}:{level}")
            grammar[f"SUBJECT:{number}:{level}"] = [Rule(0.3, (article, *rest)), Rule(0.7, ("the", *rest))]
            grammar[f"PREDICATE:{number}:{level}"] = [
                Rule(0.5, (f"INTRANSITIVE:{number}",)),
                Rule(0.3, (f"TRANSITIVE:{number}", f"SUBJECT:one:{level}")),
                Rule(0.2, (f"TRANSITIVE:{number}", f"SUBJECT:many:{level}")),
            ]
            clause = [Rule(1 - clauses, ()), Rule(clauses / 2, ("that", f"PREDICATE:{number}:{level}"))]
            if level:
                clause += [
                    Rule(clauses / 4, ("that", f"SUBJECT:{inner}:{level - 1}", f"TRANSITIVE:{inner}"))
                    for inner in ("one", "many")
                ]
            grammar[f"CLAUSE:{number}:{level}"] = clause
    return grammar
