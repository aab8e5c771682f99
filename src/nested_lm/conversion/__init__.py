"""From a Llama checkpoint of Hugging Face to a checkpoint of ours, with each layer's MLP assigned to a level."""
