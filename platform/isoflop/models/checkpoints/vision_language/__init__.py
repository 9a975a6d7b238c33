"""Hugging Face's classes of vision-language models: a file per visual side, ``kinds`` lists them, ``checkpoint`` reads them."""
