"""Image codecs in front of a model: byte strings of real length, conventional encoders and learned tokenizers."""
