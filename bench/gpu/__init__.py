"""What can be found out on a GPU only; ``python -m bench.gpu`` runs all of it."""
