"""In-context learning: n-shot classification, where one shot is one example of every class (section 3 of the paper)."""
