//! [`SmallCodec`]: prost's codec with buffers that begin small.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// What a call's buffer takes before its first message, in bytes: a condition's value fits. The usual 8 KiB are four
/// times what an open stream takes otherwise, and tens of thousands are open; a larger message makes its buffer grow.
const FIRST_BUFFER_BYTES: usize = 64;
/// A buffer with so much in it is sent, in bytes; as usual.
const YIELD_BYTES: usize = 32 << 10;

/// The codec of all our services and clients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SmallCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SmallCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(settings())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(settings())
    }
}

fn settings() -> BufferSettings {
    BufferSettings::new(FIRST_BUFFER_BYTES, YIELD_BYTES)
}
