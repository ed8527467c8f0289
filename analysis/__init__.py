"""Tables, figures and reports, from run directories alone."""
