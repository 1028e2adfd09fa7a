"""How the embedded ``nano`` weights are made: scenes, data, training, evaluation, shipping. See docs/training.md."""
