"""The rules of the probes once more, read from the text of a row alone and slowly: what the tests compare with.

Each reader takes the words of a row and yields (position of an answer, the answer, distance) for every question in it.
"""

from mmfree_jax.evaluation.probes import Copying, Counting, Induction, LongRecall, Recall, StateTracking


def recalled(words):
    seen = {}
    for at, key in enumerate(words[:-1]):
        if not key[0].isupper():
            continue
        if key in seen:
            yield at + 1, words[seen[key]], at + 1 - seen[key]
        seen[key] = at + 1


def copied(words):
    for at, word in enumerate(words):
        if word == "=":
            begin = max(i for i in range(at) if words[i] == "(")
            string = words[begin + 1 : at]
            for k, symbol in enumerate(string):
                yield at + 1 + k, symbol, len(string) + 1


def induced(words):
    for at, word in enumerate(words[:-1]):
        earlier = [i for i in range(at) if words[i] == word]
        if words.count(word) == 2 and earlier and words[earlier[0] + 1] == words[at + 1]:
            yield at + 1, words[earlier[0] + 1], at - earlier[0]


def counted(words):
    for at, word in enumerate(words):
        if word == "?":
            begin = max(i for i in range(at) if words[i] == "(")
            yield at + 2, str(words[begin:at].count(words[at + 1])), at - begin - 1


def added(words):
    for at, word in enumerate(words):
        if word == "=":
            begin = max(i for i in range(at) if words[i] == "(")
            factors = list(map(int, words[begin + 1 : at]))
            yield at + 1, str(sum(factors) % 2), len(factors)


def permuted(words):
    for at, word in enumerate(words):
        if word == "=":
            begin = max(i for i in range(at) if words[i] == "(")
            points = [1, 2, 3, 4, 5][: len(words[at - 1])]
            for permutation in words[begin + 1 : at]:
                points = [int(permutation[point - 1]) for point in points]
            yield at + 1, "".join(map(str, points)), at - begin - 1


SMALL = {  # a probe small enough to check by hand, and its reader
    "recall": (Recall(3, 4, 3), recalled),
    "copying": (Copying(3, (2, 3, 4)), copied),
    "induction": (Induction(6, (2, 4, 6), 2), induced),
    "counting": (Counting(3, 2, (2, 4, 6)), counted),
    "parity": (StateTracking("Z2", (1, 3, 5)), added),
    "permutations": (StateTracking("S3", (1, 3, 5)), permuted),
    "long-recall": (LongRecall(2, 3, 2, 2, (2, 6, 10), 2), recalled),
}
