"""Train MatMul-free language models and the baselines they are judged against."""
