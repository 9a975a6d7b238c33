"""Token reduction inside vision transformers: merging and dropping between attention and MLP."""
