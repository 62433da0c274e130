"""What happens inside the model: stages, experts, interventions."""
