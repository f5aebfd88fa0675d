"""Text in, tokens out: corpora, tokenizers, token sets on disk and the batches that training reads.

tokenizers/  bytes, byte-level BPE and SentencePiece; word_cache.py makes BPE fast
reading/     what training reads: token_set.py (the on-disk format), documents.py (targets and counts in a window),
             pipeline.py (shuffled batches whose state is one integer), prefetch.py
building/    what makes token sets:
             sources       inputs.py and lines.py (files, datasets), embedded.py (docstrings of installed packages),
                           tiers.py, distributions.py and extraction.py (tiers S, M and L), foreign.py (.bin files)
             cleaning      text.py, boilerplate.py, dedup.py, prepare.py (all steps, and the held-out split), spill.py
             tokens        build.py (parallel, resumable), workers.py, token_writer.py, card.py, packing.py
corpora.py   finds the token set of a name or a path
cli.py       the `corpus` command

Importing this package imports neither JAX nor Grain.
"""

from mmfree_jax.data.corpora import resolve_corpus, resolve_data
from mmfree_jax.data.reading.documents import Counts
from mmfree_jax.data.reading.pipeline import Batches, batches, evaluation_windows
from mmfree_jax.data.reading.token_set import Mixture, TokenSet, TokenSetError

__all__ = [
    "Batches",
    "Counts",
    "Mixture",
    "TokenSet",
    "TokenSetError",
    "batches",
    "evaluation_windows",
    "resolve_corpus",
    "resolve_data",
]
