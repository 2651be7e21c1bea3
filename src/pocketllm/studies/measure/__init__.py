"""How the claims are measured: the steps of each study, and what they share."""
