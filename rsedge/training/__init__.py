"""Fine-tuning with torch and accelerate. Needs the ``train`` extra."""
