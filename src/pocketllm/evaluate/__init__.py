"""How good a model is: perplexity, and what it writes."""
