"""How a language model over tokens gives probabilities of bytes."""
