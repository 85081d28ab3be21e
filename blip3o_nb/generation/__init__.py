"Checkpoints to tokens"
