//! What is done to an ensemble again and again, and compared with what jobs themselves have to say.

mod agent_kill;
mod node_loss;

pub use agent_kill::agent_kill;
pub use node_loss::node_loss;
