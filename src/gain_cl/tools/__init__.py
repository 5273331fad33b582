"""One module a verb that works on finished things; imported when called."""
