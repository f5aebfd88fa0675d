"""Text in, tokens out: corpora, tokenizers, token sets on disk and the batches that training reads.

    text.py          cleaning and judging text (pure functions)
    dedup.py         exact and near duplicates (MinHash and n-gram overlap in NumPy)
    embedded.py      the corpus that needs no download: documentation strings of installed packages
    tokenization.py  byte and byte-level BPE tokenizers and the hash that names a vocabulary
    inputs.py        documents out of text, JSON lines, Parquet, ArrayRecord and Hugging Face datasets
    prepare.py       repetitions removed, held-out text divided off and protected; spill.py writes the result out
    build.py         input of any size -> token set, in parallel and resumable; workers.py runs the processes
    token_set.py     the on-disk format, for reading
    token_writer.py  the on-disk format, for writing: atomic and checksummed
    packing.py       documents arranged so that windows do not cut them; document numbers for resets
    pipeline.py      shuffled batches whose whole state is one integer; whole-split evaluation
    cli.py           the `corpus` command
    corpora.py       a name or a path -> a token set, built once and cached

Importing this package imports neither JAX nor Grain.
"""

from mmfree_jax.data.corpora import resolve_corpus
from mmfree_jax.data.pipeline import Batches, batches, evaluation_batches, evaluation_windows
from mmfree_jax.data.token_set import TokenSet, TokenSetError

__all__ = [
    "Batches",
    "TokenSet",
    "TokenSetError",
    "batches",
    "evaluation_batches",
    "evaluation_windows",
    "resolve_corpus",
]
