"Images and texts to columns of tokens, and columns to batches"
