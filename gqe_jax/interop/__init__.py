"""Import and export of weights as safetensors files, and upcycling of dense models to GQE."""
