"""The hot loops of the codec: a torch reference for each, compiled versions, and the choice between them."""
