"""The only folder that imports Flower: records, strategy, clients."""
