"""A trained policy from any checkpoint of a run, as a Hugging Face directory."""
