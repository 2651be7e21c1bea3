"""The paper's claims: the numbers and verdicts of the findings, one module per study."""
