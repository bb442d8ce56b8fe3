"""Pictures of Routing values and of saved results; they never see a model."""
