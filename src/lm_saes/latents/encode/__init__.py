"""From inputs to codes: encoders, each with selection and the gradients of what was selected."""
