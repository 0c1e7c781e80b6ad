"""What may be loaded, and loading it whole: safetensors alone, of the right architecture."""
