"""What a run has recorded, as pages and pictures for people, and as values for programs."""
