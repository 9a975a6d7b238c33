"""DocumentSelection of training documents: the training set is compressed, the model is trained on what is kept."""
