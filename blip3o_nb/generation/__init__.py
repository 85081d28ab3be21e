"Checkpoints to tokens, and tokens to images"
