"The idea: probability paths, samplers and losses, on tensors alone"
