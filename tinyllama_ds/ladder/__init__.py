"""Small runs that predict the loss of a large one before it starts: their sizes, the fit over them, and its page."""
