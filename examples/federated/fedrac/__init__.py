"""Fed-RAC-LoRA on Flower: a server, its clients, and a federation on loopback."""
