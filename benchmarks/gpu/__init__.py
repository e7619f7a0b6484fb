"""Models on a GPU through the gateway, against a bare loop on the same GPU."""
