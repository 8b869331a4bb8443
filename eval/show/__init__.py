"""Tables and plots as a person sees them."""
