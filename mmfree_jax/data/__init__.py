"""Text in, tokens out: corpora, tokenizers, token sets on disk and the batches that training reads.

    text.py          cleaning and judging text (pure functions)
    boilerplate.py   lines that stand in very many documents
    dedup.py         exact and near duplicates (MinHash and n-gram overlap in NumPy)
    prepare.py       boiler plate and repetitions removed, held-out text divided off; spill.py writes the result out
    embedded.py      the corpus that needs no download: documentation strings of installed packages
    tiers.py         tiers S, M and L; distributions.py fetches their packages, extraction.py finds the prose in files
    inputs.py        documents out of text, JSON lines, Parquet, ArrayRecord and Hugging Face datasets
    lines.py         lines and records out of files and parts of files, compressed or not, in little memory
    tokenization.py  byte and byte-level BPE tokenizers, a vocabulary's hash; word_cache.py makes BPE fast
    spm.py           SentencePiece models, Mistral's among them
    build.py         input of any size -> token set, in parallel and resumable; workers.py runs the processes
    foreign.py       .bin files of nanoGPT, llm.c and Megatron -> token set
    token_set.py     the on-disk format, for reading; mixtures of sets
    token_writer.py  the on-disk format, for writing: atomic and checksummed; card.py describes the sources
    packing.py       documents arranged so that windows do not cut them; document numbers for resets
    pipeline.py      shuffled batches whose state is one integer; prefetch.py makes them ahead, bench.py times them
    counts.py        what training took in: targets, different ones, pairs that attention sees
    corpora.py       a name or a path -> a token set
    cli.py           the `corpus` command

Importing this package imports neither JAX nor Grain.
"""

from mmfree_jax.data.corpora import resolve_corpus, resolve_data
from mmfree_jax.data.reading.documents import Counts
from mmfree_jax.data.reading.pipeline import Batches, batches, count_examples, evaluation_batches, evaluation_windows
from mmfree_jax.data.reading.token_set import Mixture, TokenSet, TokenSetError

__all__ = [
    "Batches",
    "Counts",
    "Mixture",
    "TokenSet",
    "TokenSetError",
    "batches",
    "count_examples",
    "evaluation_batches",
    "evaluation_windows",
    "resolve_corpus",
    "resolve_data",
]
