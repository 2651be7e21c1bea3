"""The paper's claims: findings, what the tables compute, and pictures, one module per study."""
