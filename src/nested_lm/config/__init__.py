"""What a run is: strict sections, composed by Hydra, judged by pydantic."""
