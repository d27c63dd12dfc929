"""How good SAEs are: on held-out text, in the model, and against the concept bench."""
