"""Networks of methods that bring models of their own."""
