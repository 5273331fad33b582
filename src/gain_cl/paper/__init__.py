"""What is printed of finished experiments: tables, figures and a report, from results/ alone.
Torch-free."""
