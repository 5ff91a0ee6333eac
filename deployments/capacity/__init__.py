"""What fleet a traffic needs, and whether it keeps its word: traffic, a simulator of fleets, prices, and the search for the cheapest mix of cards."""
