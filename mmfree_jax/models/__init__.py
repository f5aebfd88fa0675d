"""The models: token mixers, channel mixing, and the one LanguageModel that stacks them."""
