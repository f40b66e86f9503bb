"""The items of one environment in order, and the polls that wait for them."""
