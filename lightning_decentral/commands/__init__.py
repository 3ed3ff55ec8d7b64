"""What ``lightning-decentral COMMAND`` runs: one module for each command."""
