"""From logits to text: choosing tokens, going on from a state, turns of a conversation."""
