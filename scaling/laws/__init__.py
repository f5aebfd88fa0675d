"""Loss as a function of parameters and tokens: values and derivatives in centred coordinates."""
