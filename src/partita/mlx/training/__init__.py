"""What a training step needs beside the model."""
